"""A model that draws taught a subject of its user's from a few pictures, by losses on the maps of words.

manyheads steer personalise dit --with disendiff --images DIR --subject "mine=a" --out DIR
"""
