"""The Lightning side: module, trainer, checkpoints, monitors."""
