//! Unpacks compressed layers, within a ratio, in a thread of its own, and says what came out.

use std::io::{self, BufRead, BufReader, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::StreamingDecoder;

use crate::digest::{Digest, Hash};
use crate::limits::{Limits, RATIO_COUNTS_FROM};
use crate::tarfile::bad;

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const PIECE: usize = 256 << 10;
/// Pieces that may lie between the two threads.
const PIECES: usize = 8;

/// How bytes are packed, by how they begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    pub(crate) fn of(start: &[u8]) -> Self {
        if start.starts_with(&GZIP) {
            Self::Gzip
        } else if start.starts_with(&ZSTD) {
            Self::Zstd
        } else {
            Self::Plain
        }
    }
}

/// Counts what is read.
struct Counting<R>(R, Arc<AtomicU64>);

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.0.read(into)?;
        self.1.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// Zstandard files are frames, one after the other; the library reads one.
struct Frames<R: BufRead> {
    source: Option<R>,
    frame: Option<Box<StreamingDecoder<R, ruzstd::decoding::FrameDecoder>>>,
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(mut frame) = self.frame.take() {
                let n = frame.read(into)?;
                if n > 0 || into.is_empty() {
                    self.frame = Some(frame);
                    return Ok(n);
                }
                self.source = Some(frame.into_inner());
            }
            let Some(mut source) = self.source.take() else {
                return Ok(0);
            };
            if source.fill_buf()?.is_empty() {
                return Ok(0);
            }
            let frame = StreamingDecoder::new(source)
                .map_err(|e| bad(format!("its zstd data are damaged: {e}")))?;
            self.frame = Some(Box::new(frame));
        }
    }
}

/// A reader of what is in `packed`, whichever way that is packed.
pub(crate) fn unpacked<'a>(
    packed: impl Read + Send + 'a,
    limits: &Limits,
) -> io::Result<(Packing, Box<dyn Read + Send + 'a>)> {
    let count = Arc::new(AtomicU64::new(0));
    let mut packed = BufReader::with_capacity(PIECE, Counting(packed, Arc::clone(&count)));
    let packing = Packing::of(packed.fill_buf()?);
    let inner: Box<dyn Read + Send + 'a> = match packing {
        Packing::Plain => return Ok((packing, Box::new(packed))),
        Packing::Gzip => Box::new(MultiGzDecoder::new(packed)),
        Packing::Zstd => Box::new(Frames {
            source: Some(packed),
            frame: None,
        }),
    };
    let bounded = Bounded {
        inner,
        packed: count,
        unpacked: 0,
        ratio: limits.ratio,
    };
    Ok((packing, Box::new(bounded)))
}

/// Fails where a few bytes become very many.
struct Bounded<R> {
    inner: R,
    packed: Arc<AtomicU64>,
    unpacked: u64,
    ratio: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(into).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                io::Error::new(e.kind(), "its compressed data are cut off")
            }
            _ => bad(format!("its compressed data are damaged: {e}")),
        })?;
        self.unpacked += n as u64;
        let most = self
            .packed
            .load(Ordering::Relaxed)
            .saturating_mul(self.ratio);
        if self.unpacked > most.max(RATIO_COUNTS_FROM) {
            return Err(bad(format!(
                "it unpacks to more than {} times its size, which is what decompression bombs do; for an image that you \
                 trust, --max-ratio raises that",
                self.ratio
            )));
        }
        Ok(n)
    }
}

/// Runs `work` on what `source` gives, which is read, unpacked and hashed in another thread. Gives the digest of all of it.
pub(crate) fn in_thread<T, E: From<io::Error>>(
    mut source: impl Read + Send,
    work: impl FnOnce(&mut dyn Read) -> Result<T, E>,
) -> Result<(T, Digest), E> {
    let (full, pieces) = mpsc::sync_channel::<io::Result<Vec<u8>>>(PIECES);
    let (empties, empty) = mpsc::channel::<Vec<u8>>();
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let mut hash = Hash::default();
            loop {
                let mut piece = empty.try_recv().unwrap_or_default();
                piece.resize(PIECE, 0);
                let n = match fill(&mut source, &mut piece) {
                    Ok(n) => n,
                    Err(e) => {
                        // Whoever does not listen has an error of its own.
                        let _ = full.send(Err(e));
                        return hash;
                    }
                };
                piece.truncate(n);
                hash.update(&piece);
                if n == 0 || full.send(Ok(piece)).is_err() {
                    return hash;
                }
            }
        });
        let mut input = Pieces {
            pieces: Some(pieces),
            empties,
            piece: Vec::new(),
            at: 0,
        };
        let done = work(&mut input).and_then(|done| {
            // What follows the archive belongs to the digest.
            io::copy(&mut input, &mut io::sink())?;
            Ok(done)
        });
        input.pieces = None;
        let hash = reader
            .join()
            .map_err(|_| bad("the thread that unpacks it failed"))?;
        Ok((done?, hash.digest()))
    })
}

fn fill(source: &mut impl Read, into: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < into.len() {
        match source.read(&mut into[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

struct Pieces {
    pieces: Option<mpsc::Receiver<io::Result<Vec<u8>>>>,
    empties: mpsc::Sender<Vec<u8>>,
    piece: Vec<u8>,
    at: usize,
}

impl Read for Pieces {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.at == self.piece.len() {
            let Some(Ok(next)) = self.pieces.as_ref().map(mpsc::Receiver::recv) else {
                return Ok(0);
            };
            let used = std::mem::replace(&mut self.piece, next?);
            // The other thread may have ended.
            let _ = self.empties.send(used);
            self.at = 0;
        }
        let n = into.len().min(self.piece.len() - self.at);
        into[..n].copy_from_slice(&self.piece[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}
