"""What tests share: builders of checkpoints, plain references, the command line, paths."""
