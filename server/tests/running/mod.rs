//! The built program as a running hub; killed if a test fails before it has stopped.

// Each test uses what it needs.
#![allow(dead_code)]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};

pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) lines: BufReader<ChildStdout>,
    /// What it has logged, as far as it was read.
    pub(crate) log: String,
    pub(crate) pages: SocketAddr,
}

impl Running {
    /// Runs the command until its pages are open.
    pub(crate) fn spawn(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let nowhere = SocketAddr::from(([0; 4], 0));
        let mut running = Self { child, lines, log: String::new(), pages: nowhere };
        let line = running.until("Pages are open address=");
        running.pages = line.rsplit_once('=').unwrap().1.trim().parse().unwrap();
        running
    }

    /// Waits for the log line that says so.
    pub(crate) fn until_ready(&mut self) {
        self.until("The hub is ready");
    }

    /// Waits for a log line with this text, and returns it.
    pub(crate) fn until(&mut self, text: &str) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.lines.read_line(&mut line).unwrap(), 0, "the program ended: {}", self.log);
            self.log += &line;
            if line.contains(text) {
                return line;
            }
        }
    }

    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// The answer of the pages to a request such as `GET /healthz`.
    pub(crate) fn ask(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.pages).unwrap();
        write!(stream, "{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}
