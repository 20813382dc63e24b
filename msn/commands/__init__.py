"""One short module a command; the only place that knows Hydra."""
