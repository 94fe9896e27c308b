"""The files of Hugging Face PEFT and of the paper's authors, read and written."""
