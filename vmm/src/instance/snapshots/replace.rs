//! Putting a copy in an image's place, such that it can be undone.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use devices::image::{Image, ImageConfig, copy_file};
use tempfile::TempPath;
use tracing::error;

use super::manifest::{directory, sync_directory};
use super::store::StoredDisk;

/// A file that is to be an image, or is one for a try. Dropped before it is finished, what was
/// there before is there again.
pub(super) struct Replacement {
    /// The image.
    path: PathBuf,
    config: ImageConfig,
    /// The file that is to be the image, beside it.
    fresh: Option<TempPath>,
    /// The file that was the image, under another name.
    before: Option<TempPath>,
}

impl Replacement {
    /// Makes a copy of `from`, to be put in the disk's place.
    pub(super) fn prepare(
        disk: &StoredDisk,
        from: &Path,
        go_on: &dyn Fn() -> bool,
    ) -> io::Result<Self> {
        let file = File::open(from)?;
        let fresh = temporary(&disk.image, |path| {
            copy_file(&file, from, path, go_on).map_err(io::Error::other)?;
            File::open(path)?.sync_all()
        })?;
        // The image's own: a copy of it may have been made by somebody else.
        fs::set_permissions(&fresh, fs::metadata(&disk.image)?.permissions())?;
        Ok(Self {
            path: disk.image.clone(),
            config: disk.config.clone(),
            fresh: Some(fresh),
            before: None,
        })
    }

    /// The file that is to be the image.
    pub(super) fn fresh(&self) -> &Path {
        self.fresh.as_deref().unwrap_or(&self.path)
    }

    /// Opens it as the image that it is to be.
    pub(super) fn open(&self) -> devices::image::Result<Image> {
        Image::open_before_rename(&self.config, self.fresh())
    }

    /// Puts it in the image's place. There is always an image there: this one or the old one.
    pub(super) fn apply(&mut self) -> io::Result<()> {
        let Some(fresh) = &self.fresh else {
            return Ok(());
        };
        let before = temporary(&self.path, |path| fs::hard_link(&self.path, path))?;
        fs::rename(fresh, &self.path)?;
        self.before = Some(before);
        if let Some(fresh) = self.fresh.take() {
            // It has that name no more.
            let _ = fresh.keep();
        }
        sync_directory(directory(&self.path))
    }

    /// It stays; what was there before goes.
    pub(super) fn finish(mut self) {
        self.before = None;
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        let Some(before) = self.before.take() else {
            return;
        };
        if let Err(err) = fs::rename(&before, &self.path) {
            let kept = before.keep().unwrap_or_default();
            error!(
                "{}: the image cannot be put back; it is at {}: {err}",
                self.path.display(),
                kept.display()
            );
        } else {
            let _ = before.keep();
        }
    }
}

/// Makes a file beside the image, with a name that is not in use, and goes with the path.
fn temporary(image: &Path, make: impl Fn(&Path) -> io::Result<()>) -> io::Result<TempPath> {
    let mut prefix = OsString::from(".");
    prefix.push(image.file_name().unwrap_or_default());
    prefix.push(".");
    let made = tempfile::Builder::new()
        .prefix(&prefix)
        .suffix(".tmp")
        .make_in(directory(image), make)?;
    Ok(made.into_temp_path())
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::image::Cache;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn an_image_is_replaced_for_good_or_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let (image, copy) = (dir.path().join("image"), dir.path().join("copy"));
        fs::write(&image, [1; 512]).unwrap();
        fs::write(&copy, [2; 512]).unwrap();
        let disk = StoredDisk {
            id: "disk0".to_owned(),
            config: ImageConfig {
                path: image.clone(),
                format: None,
                readonly: false,
                cache: Cache::Writeback,
            },
            image: image.clone(),
        };
        let first = |path: &Path| fs::read(path).unwrap()[0];
        let prepare = || Replacement::prepare(&disk, &copy, &|| true).unwrap();
        drop(prepare());
        let mut undone = prepare();
        undone.apply().unwrap();
        assert_eq!(first(&image), 2);
        drop(undone);
        assert_eq!(first(&image), 1);
        assert_eq!(names(dir.path()), ["copy", "image"]);

        let mut done = prepare();
        let opened = done.open().unwrap();
        opened.lock().unwrap();
        done.apply().unwrap();
        done.finish();
        assert_eq!(first(&image), 2);
        assert_eq!(names(dir.path()), ["copy", "image"]);
        // It was locked all along.
        let other = Image::open(&disk.config).unwrap();
        assert!(other.lock().is_err());
        drop(opened);
        other.lock().unwrap();
    }
}
