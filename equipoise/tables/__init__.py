"""Tables of sentences in any common layout, and which column of them is what."""
