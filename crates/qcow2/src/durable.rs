//! Writes that need a place, and what makes them last.

use crate::bytes::wide;
use crate::error::{Act, ImageError};
use crate::file::BackingRead;
use crate::image::Image;

impl Image {
    /// Writes `data` where [`lookup_write`](Self::lookup_write) said that clusters must be found first,
    /// or anywhere else. What a new cluster holds beyond the data comes from where the guest read it so
    /// far; `backing` is what lies under this image. When this returns, a killed process loses nothing of
    /// it; a crash of the host may, until [`flush`](Self::flush).
    ///
    /// It waits for the disk where old and new must not be confused after a crash.
    ///
    /// # Errors
    /// The range passes the end of the disk, the image is damaged, full or open for reading only, or a
    /// file failed. Parts of the data may have been written.
    pub fn write_allocating(
        &self,
        offset: u64,
        data: &[u8],
        backing: &dyn BackingRead,
    ) -> Result<(), ImageError> {
        let mut writer = self.lock()?;
        self.shared.check_range(offset, wide(data.len()))?;
        writer.write(&self.shared, offset, data, backing)
    }

    /// Makes everything durable that was completed before, in tables and in place.
    ///
    /// # Errors
    /// The file failed: what was written since the last flush may be lost.
    pub fn flush(&self) -> Result<(), ImageError> {
        if self.writer.is_none() {
            return Ok(());
        }
        // If this fails, what was to be given back stays counted: nobody knows which tables are durable
        // then, and a later success would not tell.
        let pending = std::mem::take(&mut self.lock()?.pending);
        self.shared.file.sync().act("flush the image")?;
        self.lock()?.release(&self.shared, &pending)
    }

    /// Flushes, writes reference counts and marks the image clean. Dropping it does the same, but can
    /// only log what goes wrong.
    ///
    /// # Errors
    /// The file failed. The image stays dirty and is repaired when it is opened the next time.
    pub fn close(self) -> Result<(), ImageError> {
        match &self.writer {
            Some(_) => self.lock()?.close(&self.shared),
            None => Ok(()),
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let Ok(mut writer) = self.lock() else { return };
        if let Err(e) = writer.close(&self.shared) {
            log::warn!("qcow2: the image was not closed cleanly: {e}");
        }
    }
}
