"""Language models and value models: anything that scores or draws tokens. One protocol in `base.py`."""
