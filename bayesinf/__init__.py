"""Which training data made a neural network behave as it does, and how sure one can be."""

from bayesinf import scores
from bayesinf._accuracy import MonteCarloWarning, Until
from bayesinf._attribute import attribute, available_methods
from bayesinf._batching import Batches
from bayesinf._calibration import Calibration, calibrate
from bayesinf._chains import FailedChainsWarning
from bayesinf._compare import compare
from bayesinf._diagnostics import ConvergenceWarning, diagnose
from bayesinf._disk import StoreError
from bayesinf._families import sample_each
from bayesinf._gradient_noise import GradientNoise, GradientNoiseWarning, gradient_noise
from bayesinf._gradients import VectorizationWarning
from bayesinf._language import CausalLM
from bayesinf._learning_coefficient import llc, wbic
from bayesinf._likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from bayesinf._observing import PaddingWarning
from bayesinf._posterior import LocalPosterior
from bayesinf._precision import PrecisionWarning
from bayesinf._run import DivergenceError
from bayesinf._sampling import sample
from bayesinf._scores import make_scores
from bayesinf._streaming import StreamingCovariance
from bayesinf._task import Task
from bayesinf._traces import TraceStore, open_traces
from bayesinf.attribution._arnoldi import arnoldi
from bayesinf.attribution._astra import astra
from bayesinf.attribution._bif import bif
from bayesinf.attribution._checkpoints import influence_over_checkpoints
from bayesinf.attribution._conjugate_gradient import conjugate_gradient
from bayesinf.attribution._datainf import datainf
from bayesinf.attribution._deflated_ekfac import deflated_ekfac
from bayesinf.attribution._difficulty import el2n, example_loss, grand, vog
from bayesinf.attribution._ekfac import ekfac
from bayesinf.attribution._ensemble import ensemble
from bayesinf.attribution._entry_points import MethodWarning
from bayesinf.attribution._gauss_newton import gauss_newton
from bayesinf.attribution._grad_cos import grad_cos
from bayesinf.attribution._grad_dot import grad_dot
from bayesinf.attribution._group_influence import group_influence
from bayesinf.attribution._group_scores import group_scores
from bayesinf.attribution._hessian import hessian
from bayesinf.attribution._kfac import kfac
from bayesinf.attribution._knn_shapley import knn_shapley
from bayesinf.attribution._lissa import lissa
from bayesinf.attribution._logra import logra
from bayesinf.attribution._mfac import mfac
from bayesinf.attribution._normalised import center, per_nat
from bayesinf.attribution._nystrom import nystrom
from bayesinf.attribution._prefilter import Candidates, prefilter
from bayesinf.attribution._random_scores import random_scores, same_class_random
from bayesinf.attribution._registry import METHODS, Method
from bayesinf.attribution._representation_similarity import representation_similarity
from bayesinf.attribution._scoring import Scoring
from bayesinf.attribution._self_variance import self_variance
from bayesinf.attribution._shrunk import shrink
from bayesinf.attribution._source import source
from bayesinf.attribution._susceptibility import susceptibility
from bayesinf.attribution._text_similarity import bm25, tf_idf
from bayesinf.attribution._top_k import top_k
from bayesinf.attribution._tracin import tracin
from bayesinf.attribution._train_loss import train_loss
from bayesinf.attribution._trak import trak
from bayesinf.attribution._trak_features import TrakFeatures, trak_features
from bayesinf.bayesian import (
    ParetoWarning,
    anomaly_scores,
    approximate_bootstrap,
    case_influence,
    case_removal,
    case_summary,
    functional_variance,
    infinitesimal_jackknife,
    loss_map,
    representative_cases,
    w_kernel,
)
from bayesinf.curvature import (
    Curvature,
    NotPositiveDefiniteError,
    SolverDivergenceError,
    SolverWarning,
    fit_curvature,
    gamma_from_damping,
    load_curvature,
    save_curvature,
    source_damping,
)
from bayesinf.evaluation import (
    AdamWRecipe,
    RemovalWarning,
    SGDRecipe,
    agreement,
    alpha_curve,
    bank_from_bergson,
    bank_from_dattri,
    bank_from_kronfluence,
    bank_from_quanda,
    disjoint_subsets,
    distributional_lds,
    effective_queries,
    lds,
    lds_difference,
    lds_null,
    lds_table,
    leave_one_out,
    listed_subsets,
    loo_correlation,
    make_bank,
    mislabel_detection,
    noise_ceiling,
    open_bank,
    pbrf,
    pbrf_correlation,
    pruning_curve,
    random_subsets,
    removal_counterfactual,
    response_gaps,
    retrain,
    retrain_with,
    save_bank,
    seed_stability,
    tail_patch,
    train_one,
)
from bayesinf.samplers import (
    HMC,
    MALA,
    SGHMC,
    SGLD,
    SGNHT,
    EKFACLaplace,
    GaussNewtonLaplace,
    Preconditioner,
    RMSpropSGLD,
    Underdamped,
)
from bayesinf.scores import SignWarning
from bayesinf.training import CheckpointRecorder, Checkpoints, open_checkpoints, unrolled_response

__version__ = "0.1.0.dev0"

__all__ = [
    "HMC",
    "MALA",
    "METHODS",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "AdamWRecipe",
    "Batches",
    "Bernoulli",
    "Calibration",
    "Candidates",
    "Categorical",
    "CausalLM",
    "CheckpointRecorder",
    "Checkpoints",
    "ConvergenceWarning",
    "Curvature",
    "DivergenceError",
    "EKFACLaplace",
    "FailedChainsWarning",
    "GaussNewtonLaplace",
    "Gaussian",
    "GradientNoise",
    "GradientNoiseWarning",
    "Likelihood",
    "LocalPosterior",
    "Method",
    "MethodWarning",
    "MonteCarloWarning",
    "NotPositiveDefiniteError",
    "PaddingWarning",
    "ParetoWarning",
    "PrecisionWarning",
    "Preconditioner",
    "RMSpropSGLD",
    "RemovalWarning",
    "SGDRecipe",
    "Scoring",
    "SignWarning",
    "SolverDivergenceError",
    "SolverWarning",
    "StoreError",
    "StreamingCovariance",
    "Task",
    "TraceStore",
    "TrakFeatures",
    "Underdamped",
    "Until",
    "VectorizationWarning",
    "agreement",
    "alpha_curve",
    "anomaly_scores",
    "approximate_bootstrap",
    "arnoldi",
    "astra",
    "attribute",
    "available_methods",
    "bank_from_bergson",
    "bank_from_dattri",
    "bank_from_kronfluence",
    "bank_from_quanda",
    "bif",
    "bm25",
    "calibrate",
    "case_influence",
    "case_removal",
    "case_summary",
    "center",
    "compare",
    "conjugate_gradient",
    "datainf",
    "deflated_ekfac",
    "diagnose",
    "disjoint_subsets",
    "distributional_lds",
    "effective_queries",
    "ekfac",
    "el2n",
    "ensemble",
    "example_loss",
    "fit_curvature",
    "functional_variance",
    "gamma_from_damping",
    "gauss_newton",
    "grad_cos",
    "grad_dot",
    "gradient_noise",
    "grand",
    "group_influence",
    "group_scores",
    "hessian",
    "infinitesimal_jackknife",
    "influence_over_checkpoints",
    "kfac",
    "knn_shapley",
    "lds",
    "lds_difference",
    "lds_null",
    "lds_table",
    "leave_one_out",
    "lissa",
    "listed_subsets",
    "llc",
    "load_curvature",
    "logra",
    "loo_correlation",
    "loss_map",
    "make_bank",
    "make_scores",
    "mfac",
    "mislabel_detection",
    "noise_ceiling",
    "nystrom",
    "open_bank",
    "open_checkpoints",
    "open_traces",
    "pbrf",
    "pbrf_correlation",
    "per_nat",
    "prefilter",
    "pruning_curve",
    "random_scores",
    "random_subsets",
    "removal_counterfactual",
    "representation_similarity",
    "representative_cases",
    "response_gaps",
    "retrain",
    "retrain_with",
    "same_class_random",
    "sample",
    "sample_each",
    "save_bank",
    "save_curvature",
    "scores",
    "seed_stability",
    "self_variance",
    "shrink",
    "source",
    "source_damping",
    "susceptibility",
    "tail_patch",
    "tf_idf",
    "top_k",
    "tracin",
    "train_loss",
    "train_one",
    "trak",
    "trak_features",
    "unrolled_response",
    "vog",
    "w_kernel",
    "wbic",
]
