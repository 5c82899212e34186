"""What the operating system gives, and files written without loss."""
