"""What is written to disk, safely: folders that appear whole, locks, sealed records, names and the cache folder."""
