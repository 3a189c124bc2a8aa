"""Make a model sparse: the dReLU reference, the swap and recovery training. Needs torch and transformers."""
