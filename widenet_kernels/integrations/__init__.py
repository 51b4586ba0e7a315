"""Our kernels and models in other people's libraries; each is imported when its user asks for it."""
