"""The paper's ideas in the plane, where a run takes seconds: `python -m plane ida isg`.

    targets      what should be drawn              scenarios    the questions, as sets of settings
    denoisers    the networks                      workers      many runs on all cores
    settings     the choices of a run              tables       means over seeds; points and graphs
    measures     how good a student is             __main__     the command
    distill      Algorithm 1

The story that goes before it, in one file: toy.py.
"""
