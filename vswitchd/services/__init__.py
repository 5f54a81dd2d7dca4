"""The gRPC servicers: each method takes a request apart, has a manager do the work, and puts the
answer together.
"""
