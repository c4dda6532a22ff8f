"""Every implementation of every hot op, one folder per op and one file per target; they know no mesh axis and
no config.
"""
