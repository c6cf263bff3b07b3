"""HTTP only: parse, call, render. One file per noun; `requests` parses, `answers` renders, `edge` is around them all."""
