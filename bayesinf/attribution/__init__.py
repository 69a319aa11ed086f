"""Attribution methods, one a file, all returning scores in one format."""
