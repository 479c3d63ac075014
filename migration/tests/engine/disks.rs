//! The disks of these tests: images of clusters over a backing file, in memory. Reads and writes
//! take the lock for a cluster at a time, so that a read that meets a write may be torn.

use std::sync::{Arc, Mutex};

use migration::bitmap::BlockBitmap;
use migration::disk::{BLOCK_SIZE, DestinationDisk, Extent, ExtentKind, SourceDisk};
use migration::vm::VmError;

use crate::machine::noise;

/// Smaller than a block, so that extents begin and end within blocks.
pub(crate) const CLUSTER: u64 = 4096;

/// Called with the name and the offset of each of the engine's calls; its error becomes that of
/// the call.
pub(crate) type DiskHook = Box<dyn FnMut(&str, u64) -> Result<(), VmError> + Send>;

#[derive(Clone, Debug, PartialEq)]
enum Cluster {
    /// What the backing file has.
    Absent,
    Zero,
    Data(Vec<u8>),
}

/// An image and who looks at it.
pub(crate) struct FakeDisk {
    pub(crate) name: String,
    pub(crate) capacity: u64,
    /// Whether there is a backing file, and only what is above it travels; otherwise what is
    /// absent is zero.
    incremental: bool,
    backing: Arc<Vec<u8>>,
    clusters: Mutex<Vec<Cluster>>,
    log: Mutex<Option<BlockBitmap>>,
    hook: Mutex<DiskHook>,
    /// Bytes written by the engine, zeroes not among them.
    pub(crate) written: Mutex<u64>,
    /// Whether all that was written is flushed.
    pub(crate) flushed: Mutex<bool>,
}

impl FakeDisk {
    fn over(name: &str, capacity: u64, backing: Arc<Vec<u8>>, incremental: bool) -> Self {
        Self {
            name: name.to_owned(),
            capacity,
            incremental,
            backing,
            clusters: Mutex::new(vec![Cluster::Absent; capacity.div_ceil(CLUSTER) as usize]),
            log: Mutex::default(),
            hook: Mutex::new(Box::new(|_, _| Ok(()))),
            written: Mutex::default(),
            flushed: Mutex::new(true),
        }
    }

    /// An empty disk.
    pub(crate) fn empty(name: &str, capacity: u64) -> Arc<Self> {
        let backing = Arc::new(vec![0; capacity as usize]);
        Arc::new(Self::over(name, capacity, backing, false))
    }

    /// A disk with data in some places, zeroes written to others, and holes.
    pub(crate) fn sparse(name: &str, capacity: u64) -> Arc<Self> {
        let disk = Self::empty(name, capacity);
        disk.scatter();
        disk
    }

    /// An overlay with some data, zeroes and holes over a backing file that is full of data.
    pub(crate) fn overlay(name: &str, capacity: u64) -> Arc<Self> {
        let backing = Arc::new(noise(capacity, capacity as usize));
        let disk = Arc::new(Self::over(name, capacity, backing, true));
        disk.scatter();
        disk
    }

    /// What the destination makes of such a disk: empty, over the same backing file.
    pub(crate) fn fresh(&self) -> Arc<Self> {
        let backing = Arc::clone(&self.backing);
        let incremental = self.incremental;
        Arc::new(Self::over(&self.name, self.capacity, backing, incremental))
    }

    /// A tenth is data, a twentieth zeroes.
    fn scatter(&self) {
        let chunk = 5 * CLUSTER;
        for (number, offset) in (0..self.capacity).step_by(chunk as usize).enumerate() {
            let len = chunk.min(self.capacity - offset);
            match number % 20 {
                0 | 7 => self.guest_write(offset, &noise(offset, len as usize)),
                13 => self.guest_zero(offset, len),
                _ => {}
            }
        }
    }

    pub(crate) fn set_hook(&self, hook: DiskHook) {
        *self.hook.lock().unwrap() = hook;
    }

    fn called(&self, name: &str, offset: u64) -> Result<(), VmError> {
        (self.hook.lock().unwrap())(name, offset)
    }

    pub(crate) fn is_logging(&self) -> bool {
        self.log.lock().unwrap().is_some()
    }

    /// The cluster ranges of `len` bytes at `offset`: cluster, begin in it, length.
    fn pieces(offset: u64, len: u64) -> impl Iterator<Item = (usize, usize, usize)> {
        let mut at = offset;
        std::iter::from_fn(move || {
            let left = (offset + len).checked_sub(at).filter(|&left| left > 0)?;
            let begin = at % CLUSTER;
            let piece = left.min(CLUSTER - begin);
            let cluster = at / CLUSTER;
            at += piece;
            Some((cluster as usize, begin as usize, piece as usize))
        })
    }

    fn cluster_len(&self, cluster: usize) -> usize {
        CLUSTER.min(self.capacity - cluster as u64 * CLUSTER) as usize
    }

    fn read_cluster(&self, clusters: &[Cluster], cluster: usize) -> Vec<u8> {
        let start = cluster * CLUSTER as usize;
        let len = self.cluster_len(cluster);
        match &clusters[cluster] {
            Cluster::Absent => self.backing[start..start + len].to_vec(),
            Cluster::Zero => vec![0; len],
            Cluster::Data(data) => data.clone(),
        }
    }

    fn change(&self, offset: u64, data: &[u8]) {
        let mut rest = data;
        for (cluster, begin, len) in Self::pieces(offset, data.len() as u64) {
            let (now, later) = rest.split_at(len);
            let mut clusters = self.clusters.lock().unwrap();
            let mut whole = self.read_cluster(&clusters, cluster);
            whole[begin..begin + len].copy_from_slice(now);
            clusters[cluster] = Cluster::Data(whole);
            rest = later;
        }
    }

    fn discard(&self, offset: u64, len: u64) {
        for (cluster, begin, len) in Self::pieces(offset, len) {
            let mut clusters = self.clusters.lock().unwrap();
            if len < self.cluster_len(cluster) {
                let mut whole = self.read_cluster(&clusters, cluster);
                whole[begin..begin + len].fill(0);
                clusters[cluster] = Cluster::Data(whole);
            } else if self.incremental || clusters[cluster] != Cluster::Absent {
                clusters[cluster] = Cluster::Zero;
            }
        }
    }

    fn wrote(&self, offset: u64, len: u64) {
        if let Some(log) = &mut *self.log.lock().unwrap() {
            let first = offset / BLOCK_SIZE;
            let end = (offset + len).div_ceil(BLOCK_SIZE);
            log.set_range(first, end - first);
        }
    }

    /// A write of the guest: first it happens, then it is logged, then it is done.
    pub(crate) fn guest_write(&self, offset: u64, data: &[u8]) {
        self.change(offset, data);
        self.wrote(offset, data.len() as u64);
    }

    /// Zeroes written, or a discard.
    pub(crate) fn guest_zero(&self, offset: u64, len: u64) {
        self.discard(offset, len);
        self.wrote(offset, len);
    }

    pub(crate) fn contents(&self) -> Vec<u8> {
        let clusters = self.clusters.lock().unwrap();
        (0..clusters.len())
            .flat_map(|cluster| self.read_cluster(&clusters, cluster))
            .collect()
    }

    /// How many bytes of the disk are data, in clusters.
    pub(crate) fn data_bytes(&self) -> u64 {
        self.count(|cluster| matches!(cluster, Cluster::Data(_)))
    }

    fn count(&self, wanted: impl Fn(&Cluster) -> bool) -> u64 {
        let clusters = self.clusters.lock().unwrap();
        let indexes = 0..clusters.len();
        indexes
            .filter(|&index| wanted(&clusters[index]))
            .map(|index| self.cluster_len(index) as u64)
            .sum()
    }

    /// Fails if this, at the destination, is not as `source` is: the same contents, and below the
    /// overlay what never was above it at the source.
    pub(crate) fn assert_arrived(&self, source: &Self) {
        let (here, there) = (self.contents(), source.contents());
        assert_eq!(here.len(), there.len());
        let differs = here.iter().zip(&there).position(|(a, b)| a != b);
        assert_eq!(differs, None, "'{}' differs from there on", self.name);
        assert!(*self.flushed.lock().unwrap(), "'{}' not flushed", self.name);
        assert!(!source.is_logging(), "'{}' is logged still", self.name);
        if self.incremental {
            // A block that was written is sent whole.
            let (here, there) = (
                self.clusters.lock().unwrap(),
                source.clusters.lock().unwrap(),
            );
            let in_block = (BLOCK_SIZE / CLUSTER) as usize;
            for (here, there) in here.chunks(in_block).zip(there.chunks(in_block)) {
                if there.iter().all(|cluster| *cluster == Cluster::Absent) {
                    assert!(here.iter().all(|cluster| *cluster == Cluster::Absent));
                }
            }
        }
    }
}

impl SourceDisk for FakeDisk {
    fn start_log(&self) -> Result<(), VmError> {
        self.called("start_log", 0)?;
        let mut log = self.log.lock().unwrap();
        assert!(log.is_none(), "logging already");
        *log = Some(BlockBitmap::new(self.capacity.div_ceil(BLOCK_SIZE)));
        Ok(())
    }

    fn harvest_dirty(&self, dirty: &mut BlockBitmap) {
        let mut log = self.log.lock().unwrap();
        let log = log.as_mut().expect("no log");
        dirty.or(log);
        *log = BlockBitmap::new(log.pages());
    }

    fn stop_log(&self) {
        assert!(self.log.lock().unwrap().take().is_some(), "no log");
    }

    fn extent(&self, offset: u64) -> Result<Extent, VmError> {
        self.called("extent", offset)?;
        assert!(self.is_logging(), "looked at before the log began");
        let clusters = self.clusters.lock().unwrap();
        let kind = |cluster: &Cluster| match cluster {
            Cluster::Absent if self.incremental => ExtentKind::Absent,
            Cluster::Absent | Cluster::Zero => ExtentKind::Zero,
            Cluster::Data(_) => ExtentKind::Data,
        };
        let first = (offset / CLUSTER) as usize;
        let same = clusters[first..]
            .iter()
            .take_while(|cluster| kind(cluster) == kind(&clusters[first]))
            .count();
        // The last one may go past the end.
        Ok(Extent {
            kind: kind(&clusters[first]),
            len: (first + same) as u64 * CLUSTER - offset,
        })
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), VmError> {
        self.called("read", offset)?;
        assert!(offset + data.len() as u64 <= self.capacity);
        let mut done = 0;
        for (cluster, begin, len) in Self::pieces(offset, data.len() as u64) {
            let whole = self.read_cluster(&self.clusters.lock().unwrap(), cluster);
            data[done..done + len].copy_from_slice(&whole[begin..begin + len]);
            done += len;
        }
        Ok(())
    }
}

/// An open image at the destination.
pub(crate) struct Target(pub(crate) Arc<FakeDisk>);

impl DestinationDisk for Target {
    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), VmError> {
        self.0.called("write", offset)?;
        assert!(offset + data.len() as u64 <= self.0.capacity);
        *self.0.flushed.lock().unwrap() = false;
        *self.0.written.lock().unwrap() += data.len() as u64;
        self.0.change(offset, data);
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64) -> Result<(), VmError> {
        self.0.called("zero", offset)?;
        assert!(offset + len <= self.0.capacity);
        *self.0.flushed.lock().unwrap() = false;
        self.0.discard(offset, len);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), VmError> {
        self.0.called("flush", 0)?;
        *self.0.flushed.lock().unwrap() = true;
        Ok(())
    }
}
