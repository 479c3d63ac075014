//! A monitor on standard input and output, with line editing if they are a terminal.
//!
//! The editor blocks, so it has a thread; commands are carried out on the main thread, where all
//! commands are.

use std::borrow::Cow;
use std::io::{self, BufRead, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::Validator;
use rustyline::{CompletionType, Config, Context, Editor, Helper};
use tokio::sync::{Notify, mpsc};

use super::complete::complete;
use super::progress::{Follower, Progress};
use super::{GREETING, Outcome, PROMPT, Session};
use crate::control::command::Control;

/// How often progress is told, where it is rewritten in place.
const PROGRESS: Duration = Duration::from_millis(200);

/// What the terminal does in the foreground, for those who read the keyboard.
#[derive(Debug, Default)]
pub struct Foreground {
    busy: AtomicBool,
    closed: AtomicBool,
    cancelled: AtomicBool,
    cancel: Notify,
}

impl Foreground {
    /// Whether a migration is being waited for.
    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Acquire)
    }

    /// The terminal is not to be used any more.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Cancels what is being waited for, if anything is.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        self.cancel.notify_one();
    }

    /// Begins something that can be cancelled: what was cancelled before does not count.
    fn begin(&self) {
        self.cancelled.store(false, Ordering::Release);
        self.busy.store(true, Ordering::Release);
    }

    fn end(&self) {
        self.busy.store(false, Ordering::Release);
    }

    /// Returns when it is cancelled; can be dropped while waiting.
    async fn cancelled(&self) {
        // A permit may be left over from before.
        while !self.cancelled.swap(false, Ordering::AcqRel) {
            self.cancel.notified().await;
        }
    }
}

enum Answer {
    Progress(String),
    End(String),
}

/// Starts the monitor. Must be called in a tokio runtime. The thread lives as long as its input.
pub fn spawn(machine: Arc<dyn Control>) -> io::Result<Arc<Foreground>> {
    let (lines, commands) = mpsc::channel(1);
    let (answers, answered) = sync_channel(16);
    let foreground = Arc::new(Foreground::default());
    let terminal = Arc::clone(&foreground);
    thread::Builder::new()
        .name("monitor".into())
        .spawn(move || {
            let result = if io::stdin().is_terminal() && io::stdout().is_terminal() {
                converse_editing(&terminal, &lines, &answered)
            } else {
                converse_plainly(&lines, &answered)
            };
            if let Err(error) = result {
                tracing::warn!(%error, "the monitor on standard input ends");
            }
        })?;
    tokio::spawn(execute(machine, commands, answers, Arc::clone(&foreground)));
    Ok(foreground)
}

async fn execute(
    machine: Arc<dyn Control>,
    mut commands: mpsc::Receiver<String>,
    answers: SyncSender<Answer>,
    foreground: Arc<Foreground>,
) {
    let mut session = Session::new(Arc::clone(&machine));
    while let Some(line) = commands.recv().await {
        let end = match session.execute(&line) {
            Outcome::Done(text) => text,
            Outcome::Working => session.finished().await,
            Outcome::Migrating => {
                foreground.begin();
                let mut follower = Follower::new(Arc::clone(&machine), PROGRESS);
                let text = loop {
                    tokio::select! {
                        progress = follower.next() => match progress {
                            // A terminal that is held up misses some.
                            Progress::Line(line) => _ = answers.try_send(Answer::Progress(line)),
                            Progress::End(text) => break text,
                        },
                        () = foreground.cancelled() => follower.cancel(),
                    }
                };
                foreground.end();
                text
            }
        };
        // The end must arrive, and waiting for a terminal must not hold up the main thread.
        let answers = answers.clone();
        let sent = tokio::task::spawn_blocking(move || answers.send(Answer::End(end)));
        if !matches!(sent.await, Ok(Ok(()))) {
            return;
        }
    }
}

/// Has a line carried out and prints the answer. False if nobody carries out lines any more.
fn run_line(
    line: String,
    lines: &mpsc::Sender<String>,
    answers: &Receiver<Answer>,
    in_place: bool,
) -> io::Result<bool> {
    let mut out = io::stdout().lock();
    if lines.blocking_send(line).is_err() {
        return Ok(false);
    }
    for answer in answers {
        match answer {
            Answer::Progress(line) if in_place => write!(out, "\r\x1b[K{line}")?,
            Answer::Progress(line) => writeln!(out, "{line}")?,
            Answer::End(text) => {
                let clear = if in_place { "\r\x1b[K" } else { "" };
                write!(out, "{clear}{text}")?;
                out.flush()?;
                return Ok(true);
            }
        }
        out.flush()?;
    }
    Ok(false)
}

fn converse_plainly(lines: &mpsc::Sender<String>, answers: &Receiver<Answer>) -> io::Result<()> {
    writeln!(io::stdout(), "{GREETING}")?;
    for line in io::stdin().lock().lines() {
        if !run_line(line?, lines, answers, false)? {
            break;
        }
    }
    Ok(())
}

fn converse_editing(
    terminal: &Foreground,
    lines: &mpsc::Sender<String>,
    answers: &Receiver<Answer>,
) -> io::Result<()> {
    let mut editor = editor().map_err(io::Error::other)?;
    writeln!(io::stdout(), "{GREETING}")?;
    while !terminal.is_closed() {
        match editor.readline(PROMPT) {
            Ok(line) => {
                if !run_line(line, lines, answers, true)? {
                    return Ok(());
                }
            }
            Err(ReadlineError::Interrupted) => {}
            Err(ReadlineError::Eof) => {
                writeln!(io::stdout(), "type quit to end ferry and its guest")?;
            }
            Err(error) => return Err(io::Error::other(error)),
        }
    }
    Ok(())
}

/// A line editor with the monitor's completion, on standard input and output.
pub fn editor() -> rustyline::Result<Editor<MonitorHelper, DefaultHistory>> {
    let config = Config::builder()
        .completion_type(CompletionType::List)
        .auto_add_history(true)
        .history_ignore_dups(true)?
        .build();
    let mut editor = Editor::with_config(config)?;
    editor.set_helper(Some(MonitorHelper));
    Ok(editor)
}

/// What the editor knows of the monitor.
#[derive(Debug)]
pub struct MonitorHelper;

impl Completer for MonitorHelper {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        pos: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        let (start, mut words) = complete(line.get(..pos).unwrap_or(line));
        // The only candidate is finished, unless it is the beginning of an address.
        if let [word] = words.as_mut_slice()
            && !word.ends_with(':')
        {
            word.push(' ');
        }
        Ok((start, words))
    }
}

impl Hinter for MonitorHelper {
    type Hint = String;
}

impl Highlighter for MonitorHelper {
    fn highlight_prompt<'b, 's: 'b, 'p: 'b>(&'s self, prompt: &'p str, _: bool) -> Cow<'b, str> {
        Cow::Borrowed(prompt)
    }
}

impl Validator for MonitorHelper {}
impl Helper for MonitorHelper {}
