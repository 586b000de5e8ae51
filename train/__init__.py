"""Training recipes for hf_engram: `python -m train.<recipe> train/configs/<run>.yaml`."""
