//! Disks, as `query-block` and `info block` show them.

use devices::disk::Disk;
use devices::image::Cache;
use serde::Serialize;

/// QAPI's `BlockInfo`, of a disk of Ferry's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockInfo {
    /// The disk's name.
    pub device: String,
    /// As in QEMU, no kind of disk has another.
    pub r#type: &'static str,
    /// Never.
    pub removable: bool,
    /// Whether the guest has locked a removable disk's door.
    pub locked: bool,
    /// Whether it is waiting for space on the host.
    pub io_status: IoStatus,
    /// The image.
    pub inserted: InsertedImage,
}

/// QAPI's `BlockDeviceIoStatus`, as far as Ferry stops a guest for an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum IoStatus {
    /// All is well.
    Ok,
    /// A request waits for space on the host.
    Nospace,
}

/// QAPI's `BlockDeviceInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct InsertedImage {
    /// The image's path.
    pub file: String,
    /// The disk's name: an image has no name of its own.
    pub node_name: String,
    /// Whether it is read-only.
    pub ro: bool,
    /// The format.
    pub drv: String,
    /// The name that the image records of its backing file.
    #[serde(rename = "backing_file", skip_serializing_if = "Option::is_none")]
    pub backing_file: Option<String>,
    /// How many backing files there are.
    #[serde(rename = "backing_file_depth")]
    pub backing_file_depth: usize,
    /// Never.
    pub encrypted: bool,
    /// How the host's page cache is used.
    pub cache: CacheInfo,
    /// Whether writes of zeroes are looked for: never.
    #[serde(rename = "detect_zeroes")]
    pub detect_zeroes: &'static str,
    /// Limits of its speed, in bytes and requests a second: none.
    #[serde(flatten)]
    pub limits: Limits,
    /// A threshold that an event is sent about: none.
    #[serde(rename = "write_threshold")]
    pub write_threshold: u64,
    /// More of the image.
    pub image: ImageInfo,
}

/// QAPI's `BlockdevCacheInfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CacheInfo {
    /// Whether the guest must flush.
    pub writeback: bool,
    /// Whether the host's page cache is bypassed.
    pub direct: bool,
    /// Whether flushes are ignored.
    pub no_flush: bool,
}

/// The limits that QAPI wants to be told; Ferry has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "QAPI's names, all of them 0")]
pub struct Limits {
    pub bps: u64,
    pub bps_rd: u64,
    pub bps_wr: u64,
    pub iops: u64,
    pub iops_rd: u64,
    pub iops_wr: u64,
}

/// QAPI's `ImageInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// The path.
    pub filename: String,
    /// The format.
    pub format: String,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// Bytes that the image takes on the host, without its backing files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
    /// Bytes of a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// The name that the image records of its backing file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// Where that is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    /// The backing file's format.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
}

impl BlockInfo {
    /// A disk as it is now. Nothing of this may wait for a request to the disk, which may be waiting
    /// for memory of a guest in post-copy.
    pub fn of(disk: &Disk) -> Self {
        let image = disk.image();
        let file = image.path().display().to_string();
        // It was resolved when the image was opened.
        let backing = image.backing().ok().flatten();
        let backing_name = backing.as_ref().map(|backing| backing.name.clone());
        Self {
            device: disk.id().to_owned(),
            r#type: "unknown",
            removable: false,
            locked: false,
            io_status: if disk.waits_for_space() {
                IoStatus::Nospace
            } else {
                IoStatus::Ok
            },
            inserted: InsertedImage {
                file: file.clone(),
                node_name: disk.id().to_owned(),
                ro: image.readonly(),
                drv: image.format().to_string(),
                backing_file: backing_name.clone(),
                backing_file_depth: image.backing_depth(),
                encrypted: false,
                cache: image.cache().into(),
                detect_zeroes: "off",
                limits: Limits::default(),
                write_threshold: 0,
                image: ImageInfo {
                    filename: file,
                    format: image.format().to_string(),
                    virtual_size: image.capacity(),
                    actual_size: image.allocated().ok(),
                    cluster_size: image.cluster_size(),
                    backing_filename: backing_name,
                    full_backing_filename: backing
                        .as_ref()
                        .map(|backing| backing.path.display().to_string()),
                    backing_filename_format: backing.map(|backing| backing.format.to_string()),
                },
            },
        }
    }
}

impl From<Cache> for CacheInfo {
    fn from(cache: Cache) -> Self {
        Self {
            writeback: true,
            direct: cache == Cache::None,
            no_flush: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use devices::image::{Format, Image, NewBacking};
    use serde_json::json;

    use super::*;

    #[test]
    fn a_disk_looks_as_in_qmp() {
        let dir = tempfile::tempdir().unwrap();
        let (base, top) = (dir.path().join("base"), dir.path().join("top"));
        let cache = Cache::Writeback;
        drop(Image::create(&base, Format::Raw, 1 << 20, None, cache).unwrap());
        let backing = NewBacking {
            name: "base".to_owned(),
            format: Format::Raw,
        };
        let image = Image::create(&top, Format::Qcow2, 1 << 20, Some(&backing), cache).unwrap();
        let allocated = image.allocated().unwrap();
        let info = BlockInfo::of(&Disk::new("root".to_owned(), image));
        assert_eq!(
            serde_json::to_value(info).unwrap(),
            json!({
                "device": "root", "type": "unknown", "removable": false, "locked": false,
                "io-status": "ok",
                "inserted": {
                    "file": top, "node-name": "root", "ro": false, "drv": "qcow2",
                    "backing_file": "base", "backing_file_depth": 1, "encrypted": false,
                    "cache": { "writeback": true, "direct": false, "no-flush": false },
                    "detect_zeroes": "off", "write_threshold": 0,
                    "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
                    "image": {
                        "filename": top, "format": "qcow2", "virtual-size": 1 << 20,
                        "actual-size": allocated, "cluster-size": 65536,
                        "backing-filename": "base", "full-backing-filename": base,
                        "backing-filename-format": "raw",
                    },
                },
            })
        );
    }
}
