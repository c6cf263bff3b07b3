// Package warm carries the warm interpreter's script inside the binary.
package warm

import _ "embed"

//go:embed python.py
var Python string
