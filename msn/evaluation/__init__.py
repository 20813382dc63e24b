"""Low-shot evaluation: frozen features, honest classifiers, tables that can be published."""
