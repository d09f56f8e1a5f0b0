"""The Gradio demo of MLLMs that see with a CLIP-MoE."""
