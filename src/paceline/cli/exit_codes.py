"""What the command line returns beside 0. PacelineError.exit_code has the codes of errors raised on purpose."""

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 128 + 2  # as a shell reports SIGINT
EXIT_CLOSED_PIPE = 128 + 13  # as a shell reports SIGPIPE: `paceline generate ... | head -1` is no failure
