"""Pictures for several people at once: one worker, an endpoint, and a page (`jaxsd serve`).

From the device outwards: `models` (a pipeline and what may be asked of it), `beside` (several of
them), `batching` (requests that can share a program do), `uploads` (pictures from strangers),
`guard` (who may ask), `api` (HTTP as OpenAI's clients speak it), `page` (a page to look at) and
`server` (all of it behind one port). Gradio, FastAPI and uvicorn come with
`pip install "jaxsd[serve]"`.
"""
