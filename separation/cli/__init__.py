"""The command line: parser, commands, and what is printed."""
