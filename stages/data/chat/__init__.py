"""Chat: conversations -> token ids and a training mask, through the model's own template.

    messages, tools --as the template takes them (messages)--> template process --> texts of every beginning
      --where each answer stands (turns)--> prompt | answer | prompt | ... --tokenizer--> ids, mask

`tokenizer.ChatTokenizer` is what stages use.
"""
