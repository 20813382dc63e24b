"""The method in plain torch; reads like the paper."""
