//! What the user has asked for, and what is quicker.

use std::io;

use super::decision::Effort;
use super::{Compressor, Setting};

/// A compressor for each effort.
#[derive(Debug)]
pub struct Compressors {
    thorough: Compressor,
    quick: Option<Compressor>,
}

impl Compressors {
    /// `None` if the first setting is [`Setting::Off`]; if only `quick` is, all is done with the first
    /// one. Fails without memory.
    pub fn new(thorough: Setting, quick: Setting) -> io::Result<Option<Self>> {
        let Some(thorough) = Compressor::new(thorough)? else {
            return Ok(None);
        };
        let quick = Compressor::new(quick)?;
        Ok(Some(Self { thorough, quick }))
    }

    /// What the user has asked for.
    pub fn setting(&self) -> Setting {
        self.thorough.setting()
    }

    /// The one for that effort.
    pub fn pick(&mut self, effort: Effort) -> &mut Compressor {
        match (effort, &mut self.quick) {
            (Effort::Quick, Some(quick)) => quick,
            _ => &mut self.thorough,
        }
    }
}
