"""Vision encoders behind one Protocol (`base.py`): timm's and open_clip's, found by name (`registry.py`)."""
