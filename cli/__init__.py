"""The command line: `app` is the program, `options` makes its commands from `api`, `summaries` prints results."""
