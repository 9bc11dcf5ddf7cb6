"""What the training loop calls: config, optim, checkpoint, report, distributed."""
