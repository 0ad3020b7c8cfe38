"""Explorers in a real browser: Voila runs a notebook, a headless Chromium shows it, a key press changes the picture."""

import importlib.util
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
CHROMEDRIVER = shutil.which('chromedriver')
NEEDS = {
    'chromium': CHROMIUM,
    'chromedriver': CHROMEDRIVER,
    'voila': importlib.util.find_spec('voila'),
    'selenium': importlib.util.find_spec('selenium'),
}
ABSENT = [name for name, found in NEEDS.items() if not found]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(ABSENT), reason=f'no browser test without {", ".join(ABSENT)}'),
]


def free_port() -> int:
    "A port that nobody listens on."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextmanager
def voila(notebook: Path, log: Path, timeout: float = 60) -> Iterator[str]:
    "Serve `notebook` with Voila for the length of the block; gives its address."
    port = free_port()
    address = f'http://127.0.0.1:{port}'
    command = [sys.executable, '-m', 'voila', str(notebook), '--no-browser', f'--port={port}', '--Voila.ip=127.0.0.1']
    with log.open('w') as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + timeout
            while not answers(f'{address}/voila/static/'):
                if server.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f'Voila did not start:\n{log.read_text()[-3000:]}')
                time.sleep(0.2)
            yield address
        finally:
            server.terminate()  # Voila ends its kernels on the way out
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def answers(address: str) -> bool:
    "Whether a server answers at `address`, with whatever it says."
    try:
        urllib.request.urlopen(address, timeout=1).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@contextmanager
def chromium(profile: Path) -> Iterator:
    "A headless Chromium for the length of the block, as a Selenium driver."
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ('headless=new', 'no-sandbox', 'disable-gpu', 'disable-dev-shm-usage', 'window-size=1100,1000'):
        options.add_argument(f'--{argument}')
    options.add_argument(f'--user-data-dir={profile}')
    # Naming the driver keeps Selenium from downloading one.
    driver = webdriver.Chrome(service=webdriver.ChromeService(CHROMEDRIVER), options=options)
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    "A page with an explorer: find its parts by their CSS classes, press keys, wait for what follows."

    def __init__(self, driver):
        self.driver = driver

    def find(self, selector: str, timeout: float = 90):
        "The first element that matches `selector`, as soon as it is there."
        from selenium.webdriver.common.by import By
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.driver, timeout)
        found = wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, selector), f'nothing matches {selector!r}')
        return found[0]

    def picture(self) -> str:
        "The address of the picture: a new one for each new picture."
        return self.find('img.rnb-picture').get_attribute('src')

    def picture_size(self) -> tuple[int, int]:
        "Width and height of the picture in its own pixels; zeros if the browser could not decode it."
        image = self.find('img.rnb-picture')
        script = 'const i = arguments[0]; return i.complete ? [i.naturalWidth, i.naturalHeight] : [0, 0]'
        return tuple(self.driver.execute_script(script, image))

    def words(self) -> str:
        "The words below the picture."
        return self.find('.rnb-words').text

    def act(self, action, timeout: float = 30) -> None:
        "Do something that changes the picture, and wait until it has changed and nothing more comes."
        from selenium.webdriver.support.ui import WebDriverWait

        before = self.picture()
        action()
        WebDriverWait(self.driver, timeout).until(lambda d: self.picture() != before, 'the picture did not change')
        settled = None
        while settled != (settled := (self.picture(), self.words())):
            time.sleep(1)

    def count_pictures(self) -> None:
        "From now on, count the pictures that come."
        script = """
            window.pictures = 0
            new MutationObserver(changes => { window.pictures += changes.length })
                .observe(arguments[0], {attributes: true, attributeFilter: ['src']})"""
        self.driver.execute_script(script, self.find('img.rnb-picture'))

    def pictures(self) -> int:
        "How many pictures have come."
        return self.driver.execute_script('return window.pictures')

    def press(self, control: str, key: str, times: int = 1) -> None:
        "Give a slider the focus and press a key, by its name in `Keys`, some times."
        from selenium.webdriver.common.keys import Keys

        handle = self.find(f'.rnb-{control} .noUi-handle')
        self.driver.execute_script('arguments[0].scrollIntoView({block: "center"}); arguments[0].focus()', handle)
        self.act(lambda: [handle.send_keys(getattr(Keys, key)) for _ in range(times)])

    def select(self, control: str, text: str) -> None:
        "Choose an entry of a menu."
        from selenium.webdriver.support.ui import Select

        self.act(lambda: Select(self.find(f'.rnb-{control} select')).select_by_visible_text(text))

    def tick(self, control: str) -> None:
        "Click on a box."
        self.act(lambda: self.find(f'.rnb-{control} input').click())

    def readout(self, control: str) -> str:
        "What is written beside a slider."
        return self.find(f'.rnb-{control} .widget-readout').text

    def errors(self) -> list[str]:
        "What the page's own scripts complained about, without what comes from Voila and from the network."
        foreign = ('Failed to load resource', 'net::ERR', 'shared module')  # Voila looks for extensions of JupyterLab
        severe = [entry['message'] for entry in self.driver.get_log('browser') if entry['level'] == 'SEVERE']
        return [message for message in severe if not any(word in message for word in foreign)]


@pytest.fixture
def drive(tmp_path, monkeypatch):
    "drive(notebook) serves and opens it, and returns its `Page` when the explorer has drawn its first picture."
    monkeypatch.setenv('ROBUSTNB_FAST', '1')
    monkeypatch.setenv('ROBUSTNB_PLAIN', '1')  # a bar made of widgets is gone before the page has found its model
    with ExitStack() as stack:

        def open_page(notebook: Path) -> Page:
            address = stack.enter_context(voila(notebook, tmp_path / 'voila.log'))
            driver = stack.enter_context(chromium(tmp_path / 'profile'))
            driver.get(address)
            page = Page(driver)
            page.find('img.rnb-picture[src]')
            return page

        yield open_page


def test_widgets_notebook(drive, root):
    page = drive(root / 'nbs' / '12_widgets.ipynb')
    assert 'Noise up to 0:' in page.words() and 'Right.' in page.words()
    assert page.picture_size() == (600, 240)

    page.count_pictures()
    page.press('noise', 'ARROW_RIGHT', times=8)
    assert page.readout('noise') == '2' and page.words().startswith('Noise up to 2:')
    assert 1 <= page.pictures() < 8, 'keys that follow each other quickly are drawn together'
    page.press('noise', 'ARROW_LEFT', times=2)
    assert page.readout('noise') == '1.5'
    assert page.words() == 'Noise up to 1.5: the most similar mean is 1, the true digit 3. Wrong.'

    page.select('digit', '7')
    assert page.words().startswith('Noise up to 1.5:') and 'the true digit 7' in page.words()
    page.tick('difference')
    assert page.picture_size() == (600, 240)
    assert not page.errors()


def test_layer_explorer(drive, root):
    page = drive(root / 'nbs' / '35_explorer.ipynb')
    assert float(page.readout('strength')) == 1
    strong, picture = page.words(), page.picture()
    assert 'the relative error is largest in relu3' in strong

    page.press('strength', 'ARROW_LEFT')
    assert float(page.readout('strength')) == 0.5
    assert page.words() != strong and page.picture() != picture

    page.select('label', '8')
    assert 'samples of class 8' in page.words()
    page.select('perturbation', 'Gaussian')
    page.select('measure', 'cosine_distance')
    assert 'the cosine distance is largest in' in page.words()
    page.select('layer', 'relu1')
    assert min(page.picture_size()) > 500
    assert not page.errors()


def test_explorer_of_attacks(drive, root):
    page = drive(root / 'nbs' / '27_paths.ipynb')
    assert page.readout('point') == '20' and page.picture_size() == (600, 456)
    assert page.words().startswith('Point 20 of 20: read as 3') and 'the true class 2 has' in page.words()

    page.press('point', 'ARROW_LEFT', times=20)
    assert page.readout('point') == '0' and page.words().startswith('Point 0 of 20: read as 2')
    page.press('eps', 'ARROW_LEFT')
    assert page.readout('eps') == '0.05 | 0.35' and 'Size of the change 0.05' in page.words()
    page.select('norm', 'L2')
    assert 'at which PGD-20 in L2 succeeds is' in page.words()
    page.select('attack', 'FGSM')
    page.tick('probabilities')
    assert page.words().startswith('Point 0 of 1: read as 2')
    assert page.picture_size() == (600, 456)
    assert not page.errors()


def test_explorer_of_uncovered_units(drive, root):
    page = drive(root / 'nbs' / '43_uncovered.ipynb')
    assert page.words().startswith('After 500 of 500 tests: 119 of 158 units in all layers')
    assert page.readout('tests') == '500' and page.picture_size() == (600, 566)

    page.press('tests', 'HOME')
    assert page.readout('tests') == '1' and page.words().startswith('After 1 of 500 tests: ')
    page.select('criterion', 'NBC')
    page.press('tests', 'END')
    assert 'ends of ranges in all layers' in page.words() and 'only test' in page.words()
    page.press('sigma', 'ARROW_RIGHT')
    assert float(page.readout('sigma')) == 0.25
    page.select('layer', 'linear1')
    assert 'of 200 ends of ranges in linear1' in page.words() and page.picture_size() == (600, 566)
    assert not page.errors()


def test_explorer_of_combinations(drive, root):
    page = drive(root / 'nbs' / '48_combinations.ipynb')
    assert page.words().startswith('6 units of all layers: 11 of 64 combinations (17.2%)')
    assert page.readout('m') == '6' and page.picture_size() == (600, 706)

    page.press('m', 'ARROW_RIGHT')
    assert page.readout('m') == '8' and page.words().startswith('8 units of all layers')
    page.select('layer', 'linear1')
    page.select('k', '2')
    page.select('label', '8')
    assert page.words().startswith('8 units of layer linear1, class 8: ') and 'makes no combination here' in page.words()
    page.select('show', 'missing')
    page.press('combination', 'ARROW_RIGHT')
    assert page.readout('combination') == '1'
    page.press('test', 'ARROW_RIGHT')
    page.select('method', 'random')
    assert 'Important by random (relative)' in page.words() and page.picture_size() == (600, 706)
    assert not page.errors()


def test_explorer_of_links(drive, root):
    page = drive(root / 'nbs' / '57_links.ipynb')
    assert page.words().startswith('conv1: high at 0.02 removes 59 of 144 weights (41.0%), step 13 of 25. clean: 98.0% right')
    assert page.readout('threshold') == '0.50' and page.picture_size() == (600, 578)

    page.press('threshold', 'ARROW_RIGHT', times=2)
    assert page.readout('threshold') == '0.58' and 'step 15 of 25' in page.words()
    page.press('threshold', 'END')
    assert page.readout('threshold') == '1.00' and 'removes 144 of 144 weights (100.0%)' in page.words()
    page.press('threshold', 'ARROW_LEFT', times=5)
    page.select('layer', 'linear2')
    page.select('filter', 'random like high')
    page.select('response', 'FGSM')
    assert page.words().startswith('linear2: random like high at ') and 'FGSM: 56.0% right before' in page.words()
    page.select('filter', 'channel')
    assert 'linear2: channel 7 removes 101 of 1,010 weights (10.0%), step 8 of 10' in page.words()
    page.tick('change')
    assert page.picture_size() == (600, 578)
    assert not page.errors()


def test_explorer_of_thresholds(drive, root):
    page = drive(root / 'nbs' / '67_thresholds.ipynb')
    assert page.words().startswith('Threshold 0.001: ') and 'of 148 units stay' in page.words()
    assert page.readout('threshold') == '0.001' and 'In relu1, PGD-5 moves features by' in page.words()

    page.press('threshold', 'ARROW_RIGHT', times=3)
    assert page.readout('threshold') == '0.01' and page.words().startswith('Threshold 0.01: ')
    page.press('threshold', 'END')
    assert page.readout('threshold') == '0.5' and page.words().startswith('Threshold 0.5: ')
    maps = page.picture_size()
    page.select('layer', 'relu3')
    assert 'In relu3, PGD-5 moves features by' in page.words()
    assert page.picture_size()[0] == maps[0] == 600 and page.picture_size() != maps
    assert not page.errors()
