"""The command line. `app` holds the program, `commands` the commands, `options` what they share."""
