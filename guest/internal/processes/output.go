package processes

import (
	"os"
	"syscall"
	"time"
)

const (
	memoryBytes     = 256 << 10
	chunkBytes      = 64 << 10
	DefaultOutput   = 16 << 20
	MinOutput       = 256 << 10
	MaxOutput       = 64 << 20
	stallPatience   = 10 * time.Second
	firstAllocation = 4 << 10
)

// spillDirectories are tried in order; /var/tmp is on disk more often than /tmp.
var spillDirectories = []string{"/var/tmp", "/tmp", "/dev/shm"}

// output is one stream of a process: the newest bytes in a ring in memory, older ones in a ring in an unlinked file.
// All offsets are absolute. Its process's mutex guards it.
type output struct {
	memory []byte // length is a power of two: byte at offset o lies at o & (len-1)
	start  int64  // memory holds [start, total)
	total  int64

	limit  int64 // size of the ring in the file
	file   *os.File
	low    int64 // the file holds [max(low, start-limit), start), unless broken
	broken bool  // the file could not be written: nothing new enters it

	readers map[*reader]struct{}
	source  *os.File // while the pump reads from it
	empty   bool     // the pump found nothing to read
	closed  bool     // end of file
	settled bool     // END may be sent: what the main process wrote has been read
	overrun int      // bytes read after the exit
}

// reader is an attachment's place in an output. The process does not overwrite what a holding reader has yet to take.
type reader struct {
	offset  int64
	moved   time.Time
	holding bool
}

func (o *output) oldest() int64 {
	if o.file == nil {
		return o.start
	}
	return max(o.low, o.start-o.limit)
}

// append takes a chunk of at most chunkBytes. False: a reader still needs what would be overwritten; try later.
func (o *output) append(chunk []byte) bool {
	need := int(o.total-o.start) + len(chunk)
	if need > len(o.memory) && len(o.memory) < memoryBytes {
		o.grow(need)
	}
	if need > len(o.memory) && !o.evict(max(need-len(o.memory), chunkBytes)) {
		return false
	}
	at := int(o.total) & (len(o.memory) - 1)
	copied := copy(o.memory[at:], chunk)
	copy(o.memory, chunk[copied:])
	o.total += int64(len(chunk))
	return true
}

func (o *output) grow(need int) {
	size := max(len(o.memory), firstAllocation)
	for size < need && size < memoryBytes {
		size *= 2
	}
	memory := make([]byte, size)
	for offset := o.start; offset < o.total; {
		from := int(offset) & (len(o.memory) - 1)
		piece := o.memory[from:min(len(o.memory), from+int(o.total-offset))]
		to := int(offset) & (size - 1)
		offset += int64(copy(memory[to:], piece))
	}
	o.memory = memory
}

// evict moves the oldest bytes of the memory to the file, or drops them if there is none.
func (o *output) evict(bytes int) bool {
	next := o.start + int64(bytes)
	if !o.broken {
		if needed, held := o.heldFrom(); held && needed < next-o.limit {
			return false
		}
		if o.spill(next) == nil {
			o.start = next
			return true
		}
		o.broken = true
	}
	if needed, held := o.heldFrom(); held && needed < next {
		return false
	}
	o.discardFile()
	o.start = next
	return true
}

func (o *output) spill(until int64) error {
	if o.file == nil {
		file, err := unlinkedFile()
		if err != nil {
			return err
		}
		o.file, o.low = file, o.start
	}
	for offset := o.start; offset < until; {
		from := int(offset) & (len(o.memory) - 1)
		to := offset % o.limit
		size := min(int64(len(o.memory)-from), until-offset, o.limit-to)
		written, err := o.file.WriteAt(o.memory[from:from+int(size)], to)
		if err != nil {
			return err
		}
		offset += int64(written)
	}
	return nil
}

func (o *output) discardFile() {
	if o.file != nil {
		_ = o.file.Close()
		o.file = nil
	}
}

func (o *output) heldFrom() (offset int64, held bool) {
	for reader := range o.readers {
		if reader.holding && (!held || reader.offset < offset) {
			offset, held = reader.offset, true
		}
	}
	return offset, held
}

// releaseStalled lets go of readers that took nothing for long, if another one waits for news.
func (o *output) releaseStalled(now time.Time) {
	waiting := false
	for reader := range o.readers {
		waiting = waiting || reader.offset == o.total
	}
	for reader := range o.readers {
		if waiting && now.Sub(reader.moved) > stallPatience {
			reader.holding = false
		}
	}
}

// readAt copies what is kept from offset on, or from the oldest byte if that is newer, and returns where it starts.
func (o *output) readAt(offset int64, into []byte) (int64, int, error) {
	offset = max(offset, o.oldest())
	if offset >= o.start {
		size := min(int64(len(into)), o.total-offset)
		copied := 0
		for int64(copied) < size {
			from := int(offset+int64(copied)) & (len(o.memory) - 1)
			copied += copy(into[copied:size], o.memory[from:])
		}
		return offset, copied, nil
	}
	from := offset % o.limit
	size := min(int64(len(into)), o.start-offset, o.limit-from)
	count, err := o.file.ReadAt(into[:size], from)
	return offset, count, err
}

func (o *output) fileBytes() int64 {
	if o.file == nil {
		return 0
	}
	return min(o.start-o.low, o.limit)
}

func unlinkedFile() (*os.File, error) {
	var last error
	for _, directory := range spillDirectories {
		file, err := os.CreateTemp(directory, ".pandastack-output-")
		if err == nil {
			err = syscall.Unlink(file.Name())
			if err == nil {
				return file, nil
			}
			_ = file.Close()
		}
		last = err
	}
	return nil, last
}
