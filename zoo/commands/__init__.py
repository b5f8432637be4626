"""The subcommands of `zoo`, one module each with `run(command, arguments)`."""
