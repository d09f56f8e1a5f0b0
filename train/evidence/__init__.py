"""``mllm bench evidence``: does a CLIP-MoE beat its controls, and does an MLLM feel it?

A cell is a method with a seed: a CLIP made by the method's recipe, measured on scenes that no
training shows, and for some methods an MLLM that sees with it. All cells start from one base.
"""
