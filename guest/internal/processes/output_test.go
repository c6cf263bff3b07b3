package processes

import (
	"bytes"
	"math/rand"
	"os"
	"testing"
)

func newOutput(limit int64) *output {
	return &output{limit: limit, readers: map[*reader]struct{}{}}
}

// pattern has the byte at each absolute offset, so that any slice can be checked.
func pattern(from, count int64) []byte {
	bytes := make([]byte, count)
	for index := range bytes {
		at := from + int64(index)
		bytes[index] = byte(at ^ at>>8 ^ at>>16)
	}
	return bytes
}

func check(t *testing.T, output *output, offset int64) {
	t.Helper()
	buffer := make([]byte, 70000)
	for offset < output.total {
		at, count, err := output.readAt(offset, buffer)
		if err != nil || count == 0 {
			t.Fatal("at", offset, count, err)
		}
		if at != max(offset, output.oldest()) || !bytes.Equal(buffer[:count], pattern(at, int64(count))) {
			t.Fatal("wrong bytes at", offset, at)
		}
		offset = at + int64(count)
	}
}

func TestRingKeepsTheNewestBytes(t *testing.T) {
	random := rand.New(rand.NewSource(1))
	output := newOutput(MinOutput)
	for output.total < 8*MinOutput {
		if !output.append(pattern(output.total, 1+random.Int63n(chunkBytes))) {
			t.Fatal("nobody holds it")
		}
		if output.total-output.oldest() < min(output.total, MinOutput) {
			t.Fatal("kept", output.total-output.oldest())
		}
		check(t, output, output.oldest())
		check(t, output, output.oldest()+random.Int63n(output.total-output.oldest()+1))
	}
	if output.fileBytes() != MinOutput {
		t.Fatal(output.fileBytes())
	}
}

func TestSmallOutputTouchesNoFile(t *testing.T) {
	output := newOutput(DefaultOutput)
	for output.total < memoryBytes {
		output.append(pattern(output.total, 4096))
	}
	if output.file != nil {
		t.Fatal("spilled")
	}
	check(t, output, 0)
}

func TestAHoldingReaderLosesNothing(t *testing.T) {
	for _, full := range []bool{false, true} {
		if full { // As if the disk had no room: only memory remains.
			saved := spillDirectories
			spillDirectories = []string{"/nonexistent"}
			defer func() { spillDirectories = saved }()
		}
		output := newOutput(MinOutput)
		reader := output.join(nil)
		for output.append(pattern(output.total, 10000)) {
			if output.total > 4*MinOutput {
				t.Fatal("never refused")
			}
		}
		check(t, output, 0)
		reader.offset = output.total
		if !output.append(pattern(output.total, 10000)) {
			t.Fatal("refused for nobody")
		}
		check(t, output, output.oldest())
	}
}

func TestFailingFileFallsBackToMemory(t *testing.T) {
	output := newOutput(MinOutput)
	for output.total < 2*memoryBytes {
		output.append(pattern(output.total, chunkBytes))
	}
	_ = output.file.Close() // Every later write fails.
	output.file, _ = os.Open("/dev/null")
	for output.total < 4*memoryBytes {
		if !output.append(pattern(output.total, chunkBytes)) {
			t.Fatal("refused")
		}
	}
	if !output.broken || output.oldest() != output.start {
		t.Fatal("still believes in the file")
	}
	check(t, output, output.oldest())
}

func TestMembersFollowSessionsParentsAndMarks(t *testing.T) {
	entries := []processEntry{
		{pid: 100, parent: 1, group: 100, session: 100},
		{pid: 101, parent: 100, group: 100, session: 100},
		{pid: 102, parent: 101, group: 102, session: 102}, // left the session, still a descendant
		{pid: 103, parent: 1, group: 100, session: 100},   // orphaned
		{pid: 104, parent: 100, zombie: true},
		{pid: 200, parent: 1, group: 200, session: 200},
	}
	if found := members("none", 100, false, entries); len(found) != 4 {
		t.Fatal(found)
	}
	// The leader was reaped and somebody else has its number now: nothing may be believed about the session.
	if found := members("none", 100, true, entries); len(found) != 0 {
		t.Fatal(found)
	}
	if found := members("none", 100, true, entries[1:]); len(found) != 3 {
		t.Fatal(found)
	}
}
