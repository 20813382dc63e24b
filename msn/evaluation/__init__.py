"""Low-shot evaluation: frozen features, classifiers, protocols, tables."""
