"""Mathematics and experiments of the theory papers: one module per paper, imported by its own name.

sgd_stability  the sharp mean-square stability threshold of SGD, the bounds below it, and what they say of networks
training       minibatch SGD for scalar-output networks: one concept used by several papers
"""
