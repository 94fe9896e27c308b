"""The ways from one method of a class to another, by their code."""

import inspect


def leads_to(cls: type, start: str, goal: str) -> bool:
    """Return True if the method `start` of a class may call the method `goal`.

    It follows the names in the code of the methods that objects of this class run: the
    first definition of each, and the next one where a definition has `super`.

    Example::

      >>> class Plain:
      ...     def forward(self):
      ...         return self.add()
      ...
      ...     def add(self): ...
      >>> class Other(Plain):
      ...     def forward(self):
      ...         return 1
      >>> leads_to(Plain, "forward", "add"), leads_to(Other, "forward", "add")
      (True, False)
    """
    left = [start]
    seen: set[str] = set()
    while left:
        name = left.pop()
        if name == goal:
            return True
        if name in seen:
            continue
        seen.add(name)
        for base in cls.__mro__:
            method = inspect.unwrap(vars(base).get(name, object))
            code = getattr(method, "__code__", None)
            if code is None:
                continue
            left.extend(code.co_names)
            if "super" not in code.co_names:
                break
    return False
