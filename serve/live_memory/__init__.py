"""A web page that continues a prompt and shows the memory of the model while it reads and writes."""
