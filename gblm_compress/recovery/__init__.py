"""Recovery: a pruned model is trained to predict what the dense one does, with its pattern kept.

`stage` is a whole recovery over `texts` (what is read), `teacher` (what the dense model says of it), `training` (the
steps, over `weights`) and `kept` (checkpoints).
"""
