"""Stateless maths on tensors, shared by mechanisms. No function here knows a mechanism."""
