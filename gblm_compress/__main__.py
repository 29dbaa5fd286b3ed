"""`python -m gblm_compress`, the same program as `gblm-compress`."""

from gblm_compress.cli.app import main

main()
