"""Programs that judge the methods by real retrainings."""
