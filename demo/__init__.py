"""The Gradio demo of MLLMs that see with a CLIP-MoE.

What the page does can also be called by name, here with the demo running at its default address:

    from gradio_client import Client, handle_file
    demo = Client("http://127.0.0.1:7860")
    print(demo.predict([handle_file("photo.jpg")], "What is in the picture?", api_name="/chat"))
    print(demo.predict(handle_file("photo.jpg"), api_name="/route"))
    print(demo.predict(handle_file("photo.jpg"), ["a cat", "a dog"], api_name="/similarity"))
"""

from demo.options import DemoOptions
from demo.serving import run_demo, start_demo

__all__ = ["DemoOptions", "run_demo", "start_demo"]
