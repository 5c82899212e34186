"""A recipe and its models applied to a mixture."""
