"""Safe writing to disk: folders that appear whole, locks and sealed records."""
