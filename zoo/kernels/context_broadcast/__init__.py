"""Context Broadcasting: half way to the mean token."""
